"""Router, experts, and the layer that joins them over a dispatcher."""
