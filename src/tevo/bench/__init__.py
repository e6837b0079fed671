"""Measuring and comparing: tasks, costs against length, the comparison of parts and its report."""
