"""Measured operators: rows of tables and records as graphs with times, and their splits."""
