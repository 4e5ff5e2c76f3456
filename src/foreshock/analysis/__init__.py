"""From run folders to tables, outcomes and sensitivity. No torch."""
