// Sorts the places of each run by id, then place: a workgroup a run, bitonic, in workgroup memory (Batcher, AFIPS 1968).
// An invocation takes at most 150 steps. A key is id * run + place within the run; places that do not exist come last.
{% include "shared/group" %}

var<workgroup> keys: array<u32, {{ run }}>;

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let first = group_id(wid) * {{ run }}u;
    for (var i = lid; i < {{ run }}u; i += {{ size }}u) {
        let place = min(first + i, {{ count - 1 }}u);
        keys[i] = select(0xffffffffu, ids_at(place) * {{ run }}u + i, first + i < {{ count }}u);
    }
    for (var k = 2u; k <= {{ run }}u; k = k << 1u) {
        for (var j = k >> 1u; j > 0u; j = j >> 1u) {
            workgroupBarrier();
            for (var pair = lid; pair < {{ run // 2 }}u; pair += {{ size }}u) {
                // The two positions that differ in bit j.
                let a = 2u * pair - (pair & (j - 1u));
                let b = a + j;
                let low = min(keys[a], keys[b]);
                let high = max(keys[a], keys[b]);
                let ascending = (a & k) == 0u;
                keys[a] = select(high, low, ascending);
                keys[b] = select(low, high, ascending);
            }
        }
    }
    workgroupBarrier();
    for (var i = lid; i < {{ run }}u; i += {{ size }}u) {
        sorted_put(first + i, keys[i]);
    }
}
