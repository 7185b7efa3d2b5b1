"""Long runs under load, faults and attacks: nothing is lost, wrong or kept. `make soak` runs them."""
