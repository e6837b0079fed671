"""Cheap adaptation of a trained model."""
