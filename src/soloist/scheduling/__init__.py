"""What runs next: requests, KV blocks, the scheduler. Policy without torch, shared by engine and simulator."""
