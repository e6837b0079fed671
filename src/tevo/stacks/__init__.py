"""Systems that own their blocks or change the length."""
