"""Builds the offline default data, emoji by several artists. Nothing else in data knows it."""
