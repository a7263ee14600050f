"""Where in a picture words are: masks and boxes by names, and how good they are. Trains nothing."""
