// Which source each step draws from: the one that is furthest behind its share. After any number of steps, each source
// has been drawn within one step of its exact share (with two sources; n - 1 with n). Integers do not drift.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

class Mixture {
public:
    // weights: above 0, of any sum.
    explicit Mixture(const std::vector<double>& weights) : drawn_(weights.size(), 0), credit_(weights.size(), 0) {
        double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
        for (double weight : weights) {
            if (!(weight > 0) || !std::isfinite(sum))
                throw std::invalid_argument("weights: expected numbers above 0, got " + std::to_string(weight));
            share_.push_back(std::max<int64_t>(1, std::llround(weight / sum * static_cast<double>(int64_t{1} << 40))));
        }
        if (share_.empty()) throw std::invalid_argument("weights: expected at least one source");
        total_ = std::accumulate(share_.begin(), share_.end(), int64_t{0});
    }

    // The source of this step; the next call is for the step after.
    uint32_t next() {
        for (size_t i = 0; i < share_.size(); ++i) credit_[i] += share_[i];
        uint32_t pick = std::max_element(credit_.begin(), credit_.end()) - credit_.begin();
        credit_[pick] -= total_;
        ++drawn_[pick];
        ++step_;
        return pick;
    }

    // Moves to a step, at a few ns per step from here, or from the beginning to go back.
    void seek(uint64_t step) {
        if (step < step_) {
            std::fill(drawn_.begin(), drawn_.end(), 0);
            std::fill(credit_.begin(), credit_.end(), 0);
            step_ = 0;
        }
        while (step_ < step) next();
    }

    // How often each source was drawn in the steps before this one.
    const std::vector<int64_t>& drawn() const { return drawn_; }

private:
    uint64_t step_ = 0;
    int64_t total_ = 0;
    std::vector<int64_t> share_, drawn_, credit_;  // credit: its share of the steps so far minus what it was drawn
};
