"""Messages of tests: requests of both services, answers, streams of them, and strategies that draw any of them."""
