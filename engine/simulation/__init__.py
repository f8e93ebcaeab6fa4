"""What the scheduler would do with a trace of requests, without a device."""
