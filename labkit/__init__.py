"""Reference implementations in plain torch, one file a topic, and the lab's shared tools. Never imports `kernels`."""
