// Spoils a shard at random, over and over, and reads it as the loader does: fuzz_shards SHARD COPY CASES SEED
//
// Half of the cases flip bytes or cut the file and leave the checksums as they were: the reader must notice, or give
// the same data. The other half make every checksum right again: the reader may give other data, but must stay within
// the file and the vocabulary. A finding ends the process: an exception that is no UserError, wrong data, or a
// sanitizer's report.

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "batches/batch.h"
#include "shards/crc32c.h"

namespace {

using Bytes = std::vector<uint8_t>;

Bytes load(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), {});
}

void store(const std::string& path, const Bytes& bytes) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

// Makes the checksums right, as far as header and footer say where they are.
void sign(Bytes& bytes) {
    if (bytes.size() < sizeof(Header) + sizeof(Footer)) return;
    Header header;
    Footer footer;
    std::memcpy(&header, bytes.data(), sizeof header);
    header.crc = crc32c(&header, offsetof(Header, crc));
    std::memcpy(bytes.data(), &header, sizeof header);
    uint8_t* end = bytes.data() + bytes.size() - sizeof footer;
    std::memcpy(&footer, end, sizeof footer);
    uint64_t index = bytes.size() - sizeof footer - footer.index_offset, data = footer.index_offset - sizeof header,
             blocks = block_count(data);
    if (footer.index_offset >= sizeof header && footer.index_offset <= bytes.size() - sizeof footer &&
        index >= blocks * 4) {
        for (uint64_t block = 0; block < blocks; ++block) {
            uint64_t start = block * kBlockBytes;
            uint32_t crc = crc32c(bytes.data() + sizeof header + start, std::min(kBlockBytes, data - start));
            std::memcpy(end - (blocks - block) * 4, &crc, 4);
        }
        footer.index_crc = crc32c(bytes.data() + footer.index_offset, index);
    }
    footer.crc = crc32c(&footer, offsetof(Footer, crc), crc32c(&header, sizeof header));
    std::memcpy(end, &footer, sizeof footer);
}

// A number that stands for everything that a few batches of each shape hold. Throws what the reader throws.
uint64_t digest(const std::string& path, uint64_t seed) {
    auto set = std::make_shared<const ShardSet>(std::vector<std::string>{path});
    uint64_t sum = set->records() + 1;
    auto take = [&](const void* data, size_t bytes) { sum = sum * 0x9E3779B97F4A7C15u + crc32c(data, bytes); };
    std::string kind(set->files()[0]->header().kind);
    bool language = kind == "text" || kind == "instruction";
    std::vector<std::pair<Shape, uint64_t>> shapes{{Shape::records, 5}};
    shapes.push_back(language ? std::make_pair(Shape::rows, uint64_t{2})
                              : std::make_pair(Shape::tokens, uint64_t{4000}));
    auto pool = std::make_shared<BufferPool>(2);
    for (auto [shape, size] : shapes) {
        Settings settings{kind, shape, size, 300, 2, 1, seed, 0, 1, seed % 2 == 1, seed % 3 == 2};
        Planner planner(settings, {set}, {1.0});
        for (int step = 0; step < 3; ++step) {
            auto batch = read_batch(settings, *set, planner.next(), *pool);
            for (size_t i = 0; batch->tokens && i < batch->tokens_count; ++i)
                if (batch->tokens[i] < 0 ||
                    static_cast<uint64_t>(batch->tokens[i]) >= set->files()[0]->header().vocab_size)
                    throw std::logic_error("a token outside the vocabulary");
            if (batch->tokens) take(batch->tokens, batch->tokens_count * 4);
            if (batch->ids) take(batch->ids, batch->tokens_count * batch->width);
            take(batch->cu_seqlens.data(), batch->cu_seqlens.size() * 4);
            take(batch->scores.data(), batch->scores.size() * 4);
            take(batch->groups.data(), batch->groups.size() * 8);
            if (batch->targets) take(batch->targets, batch->tokens_count * 4);
            if (!batch->skipped.empty()) throw UserError(batch->skipped[0]);  // noticed, and said
        }
    }
    return sum;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 5) return 2;
    std::string copy = arguments[2];
    const Bytes pristine = load(arguments[1]);
    uint64_t cases = std::stoull(arguments[3]), noticed = 0, same = 0, other = 0;
    std::mt19937_64 random(std::stoull(arguments[4]));
    auto below = [&](uint64_t n) { return random() % n; };
    for (uint64_t i = 0; i < cases; ++i) {
        Bytes bytes = pristine;
        bool whole = i % 2 == 1;  // signed again
        for (uint64_t flips = 1 + below(3) * below(3); flips > 0; --flips) {
            // header, footer and the beginning of the index are few bytes among many
            uint64_t part = below(4), at = part == 0   ? below(sizeof(Header))
                                           : part == 1 ? bytes.size() - 1 - below(sizeof(Footer))
                                           : part == 2
                                               ? bytes.size() - 1 - below(std::min<uint64_t>(bytes.size(), 2000))
                                               : below(bytes.size());
            bytes[at] ^= static_cast<uint8_t>(1 + below(255));
        }
        if (below(8) == 0) bytes.resize(below(2) ? below(bytes.size()) : bytes.size() + below(100));
        if (whole) sign(bytes);
        store(copy, bytes);
        uint64_t seed = below(6);
        try {
            uint64_t found = digest(copy, seed);
            if (whole) {
                ++other;
            } else {
                store(copy, pristine);
                if (found != digest(copy, seed)) {
                    std::fprintf(stderr, "case %lu: other data, and no error\n", static_cast<unsigned long>(i));
                    return 1;
                }
                ++same;
            }
        } catch (const UserError&) {
            ++noticed;
        } catch (const std::invalid_argument&) {
            ++noticed;  // a kind that does not fit the shape, or no records: refused before anything is read
        }
    }
    std::printf("%lu cases: %lu noticed, %lu untouched where it was read, %lu read under right checksums\n",
                static_cast<unsigned long>(cases), static_cast<unsigned long>(noticed),
                static_cast<unsigned long>(same), static_cast<unsigned long>(other));
}
