// The largest element of every row and its column: `lanes` invocations each. Of equal elements the first counts; NaN is larger than
// all numbers.
//
// Elements are compared as keys: their bits, changed so that they increase with the number, also for compilers that assume that no float
// is NaN. -0 has the key of 0.
{# Inside: row is at most the last one, col < used. largest and place have an element for each row. #}
{% include "shared/group" %}
{% if lanes > 1 %}
var<workgroup> keys: array<u32, {{ size }}>;
var<workgroup> columns: array<u32, {{ size }}>;
{% endif %}

fn key_of(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return 0xffffffffu;
    }
    if (magnitude == 0u) {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn number_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid % {{ lanes }}u;
    let wanted = group_id(wid) * {{ size // lanes }}u + lid / {{ lanes }}u;
    let row = min(wanted, {{ rows - 1 }}u);
    var key = 0u;
    var column = 0u;
    for (var col = lane; col < {{ used }}u; col += {{ lanes }}u) {
        let x = x_load(row * x_stride + col);
{% for i in range(4) %}
        let k{{ i }} = key_of(x[{{ i }}]);
        if (k{{ i }} > key && 4u * col + {{ i }}u < {{ cols }}u) {
            key = k{{ i }};
            column = 4u * col + {{ i }}u;
        }
{% endfor %}
    }
{% if lanes > 1 %}
    keys[lid] = key;
    columns[lid] = column;
    for (var step = {{ lanes // 2 }}u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (lane < step) {
            let other = keys[lid + step];
            let there = columns[lid + step];
            if (other > key || (other == key && there < column)) {
                key = other;
                column = there;
                keys[lid] = key;
                columns[lid] = column;
            }
        }
    }
{% endif %}
    if (wanted < {{ rows }}u && lane == 0u) {
        largest_put(row, number_of(key));
        place_put(row, f32(column));
        if (row == {{ rows - 1 }}u) {
            for (var i = {{ rows }}u; i < largest_stride; i++) {
                largest_put(i, 0.0);
                place_put(i, 0.0);
            }
        }
    }
}
