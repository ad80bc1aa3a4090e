"""Tests of what a platform team takes from here: Dockerfile, docker-compose.yml, deploy/. No engine is needed."""
