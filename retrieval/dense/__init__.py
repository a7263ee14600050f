"""Where in a picture words are: masks by class names, and how good masks are. Trains nothing."""
