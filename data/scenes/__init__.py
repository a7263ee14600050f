"""Builds scenes of the default drawings with exact masks and boxes. Only programs import it."""
