"""What an evaluation can be asked for, without torch."""

MAX_EXAMPLES = 500  # images that a temperature is fitted on
