"""Who holds which expert. Without torch."""
