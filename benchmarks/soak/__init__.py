"""Long runs under load, faults and attacks: they check that nothing is lost, wrong or leaked. `make soak` runs them."""
