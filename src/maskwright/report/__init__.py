"""What a run and the rooms look like to people: HTML page, model card, rooms table, docs pages."""
