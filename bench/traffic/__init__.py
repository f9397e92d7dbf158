"""What is asked, and when: pacers, lengths, prompts, sessions, traces, workloads. Pure; randomness is passed in."""
