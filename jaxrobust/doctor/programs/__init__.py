"""Analysis of compiled programs from XLA's text: instructions, costs, topologies."""
