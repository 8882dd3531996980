"""Small leaves that everything may import: process group, logging, meters, seeding, command line."""
