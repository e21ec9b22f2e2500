"""What the world is: models, layouts, clusters, workloads. Frozen, validated, without torch."""
