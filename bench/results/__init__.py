"""What came back, and what it says: records, statistics, SLOs, steady state, summaries, comparisons, reports."""
