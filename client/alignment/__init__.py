"""Several objectives: sampled answers, their rewards, and what to do with them."""
