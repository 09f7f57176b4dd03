"""Budgets: how many tokens of a request a layer may hold on the device, and which blocks leave."""
