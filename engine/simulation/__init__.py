"""The real scheduler on a trace of requests, without a device."""
