"""What proves the methods: tasks, networks trained for them, and the studies whose tables stand in docs/results.md."""
