"""What a run says about its representation while it trains."""
