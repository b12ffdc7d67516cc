"""Mixtures of experts: each token through the experts it is routed to, and no others."""
