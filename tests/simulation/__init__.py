"""What tests of the simulation and tests against it share: texts, and how streams compare."""
