"""Pictures and videos of what goes in and what comes out."""
