"""The offline default data: emoji drawn by several artists. Nothing else depends on it."""
