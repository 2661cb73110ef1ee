"""The exchange over collectives: rank 0 is the coordinator, the other ranks are silos."""
