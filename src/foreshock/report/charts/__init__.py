"""Charts: functions from a table to an Altair chart, drawn alike in the page and in static figures."""
