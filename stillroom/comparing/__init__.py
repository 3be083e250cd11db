"""`stillroom compare`: arms times seeds of one student, on one teacher and one text."""
