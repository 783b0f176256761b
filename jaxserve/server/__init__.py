"""The HTTP process: routes, validation, streaming, metrics. It knows the engine only as an EngineClient."""
