"""What the tests put around the gateway: vendors, a team's services, the wire between them, and callers."""
