"""What the service speaks over HTTP: endpoints, their answers, and JSON. Encodes and searches
nothing itself."""
