"""What a deployment will need and do: memory, step time, search over layouts, validation. Torch-free."""
