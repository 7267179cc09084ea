"""Head maps by calibration: which draft heads predict what a target head attends to, measured on texts."""
