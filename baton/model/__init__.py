"""Models: what one is (spec, torch-free), its weights, and the decoder that runs them."""
