"""Figures and, later, pages of reports: our own SVG, one offline file, no charting library."""
