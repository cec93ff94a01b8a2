"""What a run leaves to read: report.json, report.md and report.html."""
