"""Parts for judging a gateway on one machine: a simulated worker and a load generator."""
