"""Local geometry of a label: how curved, thick, narrow and visible it is at each place, and errors by these."""
