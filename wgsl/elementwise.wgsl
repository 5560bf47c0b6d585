{# Inside: i < rows width, so row < rows and col < width of the program. #}
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let first = group_id(wid) * {{ size * each }}u + lid;
{% for n in range(each) %}
    {
        let i = first + {{ n * size }}u;
        if (i < {{ rows * width }}u) {
            finish(i / {{ width }}u, i % {{ width }}u, vec4<f32>());
        }
    }
{% endfor %}
}
