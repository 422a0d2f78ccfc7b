"""How a network fits a budget: measuring and planning memory."""
