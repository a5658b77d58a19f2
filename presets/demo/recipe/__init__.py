"""How the demo's base model and data sets are made, one module a stage."""
