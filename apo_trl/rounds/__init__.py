"""On-policy rounds: the policy answers, pairs are built, the policy trains, the result is scored and answers next."""
