"""Measures of collapse: functions of the tensors around one attention, each an operator that a plan can name."""
